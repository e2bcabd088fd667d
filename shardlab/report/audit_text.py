"""x"""

import json


def audit_text(facts):
    return json.dumps(facts, indent=1)[:20000]
