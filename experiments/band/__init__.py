"""From any starting value, how close does one run come to a whole grid?"""
