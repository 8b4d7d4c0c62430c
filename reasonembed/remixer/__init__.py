"""ReMixer: training data that is not trivial, one file a stage, in the paper's order."""
