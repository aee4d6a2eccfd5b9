"""What the papers claim and what the alerts are worth, measured with this package. Imports its public names only.

One module per experiment, `python -m experiments.NAME`; `data`, `networks`, `training` and `runs` are what they share.
`report` makes the pages in `docs/experiments` from the files in `results`.
"""
