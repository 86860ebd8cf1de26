from tiny_models import one_thread, tiny  # noqa: F401
