"""One recipe per table or figure of each paper."""
