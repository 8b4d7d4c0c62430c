from hypothesis import HealthCheck, settings

# A busy machine is no failure: pytest-timeout bounds each test, hypothesis need not.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
