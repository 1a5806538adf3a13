"""The job engine: what a job is, where it is kept, and the supervisor that runs it. Knows no HTTP."""
