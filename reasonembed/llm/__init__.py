"""LLM engines behind one small protocol: requests in, completions out."""
