"""How well do small image models learn real data?"""
