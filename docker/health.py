"Ask the server in this container how it is: exit status 0 if it answers well. Standard library only."
import os
import sys
import urllib.request

page = sys.argv[1] if len(sys.argv) > 1 else 'healthz'
asked = urllib.request.Request(f"http://127.0.0.1:{os.environ.get('PORT', '5000')}/{page}")
if os.environ.get('HATEMM_TOKEN'): asked.add_header('Authorization', f"Bearer {os.environ['HATEMM_TOKEN']}")
try: answer = urllib.request.urlopen(asked, timeout=5)
except OSError as error: sys.exit(f'{page}: {error}')
print(page, answer.status)
