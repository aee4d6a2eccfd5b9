"""What people see besides numbers: loggers and figures."""
