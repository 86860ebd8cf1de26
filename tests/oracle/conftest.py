from tiny_models import calibration, one_thread, tiny  # noqa: F401
