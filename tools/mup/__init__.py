"""Does the best learning rate of a small model stay the best for larger ones?"""
