"""Stands in for torchaudio, which has no build beside this torch; the runs hear nothing."""
