"""What defenses that decode differently are made of: the check of each token, and the model it is checked against."""
