"Check a built site: links and anchors lead somewhere, pictures say what they show. Prints what is wrong; exits 1 if anything is."
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    "Ids, links and pictures of a page."

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.bare = {''}, [], []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        has = dict(attrs)
        self.ids |= {has[key] for key in ('id', 'name') if has.get(key)}
        if tag == 'a' and has.get('href'): self.links.append(has['href'])
        if tag == 'img' and not (has.get('alt') or '').strip() and has.get('role') != 'presentation': self.bare.append(has.get('src', '')[:60])


def check(root, host=''):  # host: of the site itself, whose absolute links are checked like others
    "Page → what is wrong with it."
    pages = {path: Page(path) for path in root.rglob('*.html') if not path.is_symlink()}  # one that is named twice is read once
    wrong = defaultdict(list)
    for path, page in pages.items():
        wrong[path] += [f'picture without alt: {src}' for src in page.bare]
        for link in page.links:
            inside = link.removeprefix(host) if host and link.startswith(host) else link
            parts, base = urlsplit(inside), root if inside != link else path.parent
            if parts.scheme or parts.netloc: continue
            target = (base/unquote(parts.path).lstrip('/')).resolve() if parts.path or inside != link else path.resolve()
            if target.is_dir(): target /= 'index.html'
            if not target.exists(): wrong[path].append(f'broken link: {link}')
            elif target in pages and unquote(parts.fragment) not in pages[target].ids: wrong[path].append(f'no such anchor: {link}')
    return {path: found for path, found in wrong.items() if found}


if __name__ == '__main__':
    root = Path(sys.argv[1]).resolve()
    found = check(root, *sys.argv[2:])
    for path, what in sorted(found.items()):
        for line in what: print(f'{path.relative_to(root)}: {line}')
    print(f'{len(list(root.rglob("*.html")))} pages, {sum(map(len, found.values()))} faults')
    sys.exit(bool(found))
