"""Hours and money: before a run from shapes and a probe, during it as a budget, after it as truth.

Loads neither deep learning nor Ray. `formulae` holds the arithmetic, `loads` what a configuration
asks of each stage, `estimate` the plan, `probe` and `observe` what was measured.
"""
