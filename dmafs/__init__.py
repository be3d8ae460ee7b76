"""dmafs keeps the whole recent history of a disk and shows any moment of it as a plain image file."""
