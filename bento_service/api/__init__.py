"""HTTP: wire models, routes, error answers, access. Knows ``TrlPostTrainingImpl`` and nothing below it."""
