"""The HTTP service: a FastAPI app that knows neither Ray nor torch."""
