// The annotation page: draws `state`, sends what the annotator does. All that is decided is decided in Python.
function make(tag, className, text = '') {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

function render({ model, el }) {
  const { labels, guideline, annotator, assisted, blurred } = model.get('setup');
  const root = make('div', 'hatemm-annotate');
  root.tabIndex = 0;
  root.dataset.lmSuppressShortcuts = 'true'; // keys are ours, not JupyterLab's
  const head = make('div', 'head'), item = make('div', 'item'), aside = make('div', 'aside'), buttons = make('div', 'buttons');
  aside.innerHTML = guideline; // made from Markdown in Python, with HTML escaped
  const body = make('div', 'body');
  body.append(item, aside);
  root.append(head, body, buttons);
  el.append(root);

  let waiting = false, blur = blurred, shown = null;

  function act(what, more = {}) {
    const { id } = model.get('state');
    if (waiting || (id === null && what !== 'undo')) return; // a second press is not a vote on the next item
    waiting = true;
    model.send({ do: what, id, ...more });
  }

  function toggle() {
    blur = !blur;
    item.classList.toggle('blurred', blur);
  }

  function button(key, text, press) {
    const made = make('button', 'press', `${text} `);
    made.append(make('kbd', '', key));
    made.onclick = () => { press(); root.focus(); };
    return made;
  }

  const keys = { 0: () => act('skip'), u: () => act('undo'), b: toggle };
  labels.forEach((label, i) => { keys[i + 1] = () => act('vote', { label: i }); });
  labels.forEach((label, i) => buttons.append(button(i + 1, label, keys[i + 1])));
  buttons.append(button(0, 'skip', keys[0]), button('u', 'undo', keys.u), button('b', 'blur', keys.b));

  root.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !(event.key in keys)) return;
    event.preventDefault();
    event.stopPropagation();
    keys[event.key]();
  });

  function draw() {
    waiting = false;
    const state = model.get('state');
    if (state.id !== shown) blur = blurred; // the next picture is blurred again
    shown = state.id;
    head.replaceChildren(make('b', '', annotator), make('span', '', state.progress), make('span', 'mode', assisted ? 'assisted' : 'blind'));
    item.replaceChildren();
    item.classList.toggle('blurred', blur);
    if (state.picture) {
      const picture = make('img', 'picture');
      picture.src = state.picture;
      picture.alt = 'the picture of this item';
      item.append(picture);
    }
    if (state.note) item.append(make('p', 'note', state.note));
    if (state.text) item.append(make('p', 'text', state.text));
    if (state.model) item.append(make('p', 'model', `The model says: ${state.model}`));
    if (state.message) item.append(make('p', 'message', state.message));
  }

  model.on('change:state', draw);
  draw();
  requestAnimationFrame(() => root.focus());
}

export default { render };
