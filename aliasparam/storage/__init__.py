"""One allocation in kernel order, and what has arrived in it."""
