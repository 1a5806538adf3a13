"""Files made from a URL: which URLs an operator allows, which addresses may be spoken to, and the download."""
