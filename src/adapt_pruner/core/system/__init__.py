"""Files, processes, memory and terminals: what the package asks of the machine."""
