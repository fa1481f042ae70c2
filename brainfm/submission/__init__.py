"""Challenge submissions: containers, what organisers would say to them, and how they score."""
