"""The service's own log: structlog on stderr, JSON lines for machines, colours for a terminal."""

import sys

import structlog


def configure_logs() -> None:
    """Set up structlog for this process. Call once, before the first line is logged."""
    terminal = sys.stderr.isatty()
    # Plain tracebacks: the default ones take seconds to draw, and show local variables, API keys among them.
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if terminal
        else structlog.processors.JSONRenderer()
    )
    format_exception = [] if terminal else [structlog.processors.format_exc_info]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            *format_exception,
            renderer,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
