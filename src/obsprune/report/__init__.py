"""What a run has to say: report.json and what is made of it."""
