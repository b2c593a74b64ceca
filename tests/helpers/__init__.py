"""What several tests need. No test file imports another; what two of them share is here."""
