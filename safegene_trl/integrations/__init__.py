"""Plugins for other training programs; each is imported only where that program is."""
