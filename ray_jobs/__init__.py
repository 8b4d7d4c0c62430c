"""Where and how many: one file is one `ray job submit` entry point.

No arithmetic, no prompts, no metrics: those are in `reasonembed`, which never imports Ray.
"""
