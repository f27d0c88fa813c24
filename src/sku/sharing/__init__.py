"""What is needed to give a result away: its model card, and the upload. No torch here."""
