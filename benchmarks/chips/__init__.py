"""Kernels on chips that are not here: what compiles them, what must compile, and what each costs."""
