"""Times as people read them, without Keras, whose backend may be open."""


def clock(seconds: float) -> str:
    """Seconds as a clock shows them.

    >>> clock(59), clock(3661)
    ('0:59', '1:01:01')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{minutes}:{seconds:02}"
