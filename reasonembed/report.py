"""stub to be replaced"""
def write_report(run):
    return run.dir / "report.html"
