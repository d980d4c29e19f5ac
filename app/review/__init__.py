"""Review: pictures go to people in Label Studio with what the models said, and come back as verified labels."""
