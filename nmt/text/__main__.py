"""The process that tokenises for another one. Only `nmt.text.tokens.tokenising` starts it."""

import sys

from nmt.text.tokens import serve

serve((sys.argv[1], sys.argv[2]), sys.argv[3], [int(descriptor) for descriptor in sys.argv[4:]])
