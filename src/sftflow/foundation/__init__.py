"""What every floor stands on: errors, whole files, device and precision, the calculator."""
