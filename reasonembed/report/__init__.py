"""What a person looks at after a run: one HTML file that needs nothing beside it.

Reads whatever stages have left so far; what is missing is said, and a section that cannot be drawn
costs no other. Needs no models and no cluster. One file a section; `page.py` has their
order.
"""

from reasonembed.report.page import write_report

__all__ = ["write_report"]
