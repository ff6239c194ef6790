"""How a kernel is compiled, cached, chosen and launched."""
