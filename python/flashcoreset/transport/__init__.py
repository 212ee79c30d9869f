"""Exact optimal transport between equal sources and equal sinks, kept optimal while sources are exchanged: what GORACS' scores
and exchanges stand on."""
