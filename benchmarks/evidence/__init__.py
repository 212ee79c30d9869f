"""What each paper claims, beside a control that could refute it: ``python -m benchmarks.evidence`` (``make evidence``) runs one script
per method and writes docs/evidence.md with its pictures.

A script has `run(seeds, quick)`, which returns an `Evidence`. Each measure has the same seeds for every arm, so that a claim is counted
seed by seed. The figures are kept in benchmarks/results/evidence, one file per method; the page is made of these files.
"""
