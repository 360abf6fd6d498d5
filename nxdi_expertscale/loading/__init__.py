"""A state dict on its way into NxDI: scales, routers, exclusions, and that nothing is lost."""
