"""Fitted statistics: the record, its file, the conventions behind it and what it warns about."""
