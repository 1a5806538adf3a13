"""Everything that happens inside a trainer process, and the specification it is given.

``spec``, ``preferences``, ``events`` and ``run_directory`` import nothing heavy: the API process uses them too.
"""
