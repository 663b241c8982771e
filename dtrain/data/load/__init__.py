"""Batches in time: read ahead by threads, in bounded memory."""
