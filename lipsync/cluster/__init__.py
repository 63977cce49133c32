"""Engines on other machines behind one server: routing, the lines to them, and Ray Serve, which runs them."""
