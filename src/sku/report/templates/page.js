"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  const source = find("replies-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const PAGE = 25, LONG = 1500, MODELS = ["base", "unlearned"];
  const ranks = Object.keys(data.outcomes);
  const open = new Set();
  let page = 0;
  data.rows.forEach((row, number) => {
    row.number = number;
    row.changed = row.base.outcome !== row.unlearned.outcome;
    row.text = [row.prompt, row.category || "", row.base.text, row.unlearned.text].join("\n").toLowerCase();
  });
  let found = data.rows;

  const fill = (id, words, count) => {
    const select = find(id);
    select.append(new Option("all", ""));
    for (const [name, text] of Object.entries(words)) {
      const number = data.rows.filter((row) => count(row) === name).length;
      if (number) select.append(new Option(`${text} (${number.toLocaleString("en")})`, name));
    }
  };
  fill("split", data.splits, (row) => row.split);
  fill("kind", data.kinds, (row) => row.kind);
  for (const model of MODELS) fill(`${model}-outcome`, data.outcomes, (row) => row[model].outcome);

  const order = {
    asked: (one, other) => one.number - other.number,
    outcome: (one, other) => ranks.indexOf(one.unlearned.outcome) - ranks.indexOf(other.unlearned.outcome),
    prompt: (one, other) => one.prompt.localeCompare(other.prompt, "en"),
    longest: (one, other) => other.unlearned.text.length - one.unlearned.text.length,
    p: (one, other) => (other.unlearned.p ?? -1) - (one.unlearned.p ?? -1),
  };

  const select = () => {
    const words = find("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = { split: find("split").value, kind: find("kind").value };
    const outcomes = { base: find("base-outcome").value, unlearned: find("unlearned-outcome").value };
    const changed = find("changed").checked;
    found = data.rows.filter((row) =>
      Object.entries(wanted).every(([key, value]) => !value || row[key] === value) &&
      MODELS.every((model) => !outcomes[model] || row[model].outcome === outcomes[model]) &&
      (!changed || row.changed) &&
      words.every((word) => row.text.includes(word)));
    const compare = order[find("sort").value];
    found.sort((one, other) => compare(one, other) || one.number - other.number);
    page = 0;
    show();
  };

  const wording = (text, name) => {
    const block = make("p", name ? `words ${name}` : "words");
    block.dir = "auto";
    if (!text) {
      block.append(make("em", "quiet", "nothing"));
      return [block];
    }
    if (text.length <= LONG) {
      block.textContent = text;
      return [block];
    }
    block.textContent = `${text.slice(0, LONG)}\u2026`;
    const more = make("button", "more", `Show all ${text.length.toLocaleString("en")} characters`);
    more.type = "button";
    more.addEventListener("click", () => {
      block.textContent = text;
      block.classList.add("long");
      block.tabIndex = 0;
      block.setAttribute("role", "region");
      block.setAttribute("aria-label", "the whole text");
      more.remove();
      block.focus();
    });
    return [block, more];
  };

  const unread = (text) => make("span", "unread", text.slice(0, 400).replace(/\S/gu, "x"));

  const veiled = (text, what, key) => {
    const box = make("div");
    const draw = (focus) => {
      box.replaceChildren();
      const shown = open.has(key);
      const size = `${text.length.toLocaleString("en")} characters`;
      if (shown) {
        const hide = make("button", "more", "Blur again");
        hide.type = "button";
        hide.setAttribute("aria-label", `Shown: ${what}. Blur it again.`);
        const secret = make("div", "secret");
        secret.append(...wording(text));
        const copy = make("div", "veil only-print");
        copy.setAttribute("aria-hidden", "true");
        copy.append(unread(text));
        hide.addEventListener("click", () => { open.delete(key); draw(true); });
        box.append(secret, copy, hide);
        if (focus) hide.focus();
      } else {
        const ask = make("button", "veil");
        ask.type = "button";
        ask.setAttribute("aria-label", `Blurred: ${what}, ${size}. Show it.`);
        const blur = unread(text);
        blur.setAttribute("aria-hidden", "true");
        ask.append(blur, make("span", "ask", `blurred, ${size}: show`));
        ask.addEventListener("click", () => { open.add(key); draw(true); });
        box.append(ask);
        if (focus) ask.focus();
      }
      if (focus) find("status").textContent = shown ? `Shown: ${what}.` : `Blurred: ${what}.`;
      find("hide-all").hidden = !open.size;
    };
    draw(false);
    return box;
  };

  // What a person says of a reply stays in this page until it is saved as the file that sku judge reads.
  const LABELS = ["harmful", "refusal", "safe", "gibberish"];
  const labels = new Map();
  let saved = true;
  const tell = () => {
    find("save-labels").disabled = !labels.size;
    find("save-labels").textContent = `Save ${labels.size.toLocaleString("en")} labels`;
  };
  const labelling = (row, model) => {
    const key = `${row.id} ${row[model].sha}`;
    const group = make("div", "labels");
    group.setAttribute("role", "radiogroup");
    group.setAttribute("aria-label", `Your label of the ${model} model's reply to prompt ${row.number + 1}`);
    const buttons = LABELS.map((name, place) => {
      const button = make("button", "label", `${place + 1} ${name}`);
      button.type = "button";
      button.setAttribute("role", "radio");
      button.addEventListener("click", () => choose(name));
      return button;
    });
    const paint = () => buttons.forEach((button, place) =>
      button.setAttribute("aria-checked", String(labels.get(key)?.label === LABELS[place])));
    const choose = (name) => {
      if (labels.get(key)?.label === name) labels.delete(key);
      else labels.set(key, { id: row.id, label: name, split: row.split, kind: row.kind, reply_sha256: row[model].sha });
      saved = false;
      // Two models may have said the same: that reply has one label.
      document.querySelectorAll(".labels").forEach((other) => other.dispatchEvent(new Event("paint")));
      tell();
    };
    group.addEventListener("keydown", (event) => {
      const place = Number(event.key) - 1;
      if (!LABELS[place] || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      choose(LABELS[place]);
      const groups = [...document.querySelectorAll(".labels")];
      const next = groups[groups.indexOf(group) + 1];
      if (next) next.querySelector("button").focus();
    });
    group.addEventListener("paint", paint);
    group.append(...buttons);
    paint();
    return group;
  };
  find("save-labels").addEventListener("click", () => {
    const lines = [...labels.values()].map((row) => data.label_columns.map((name) => row[name] ?? "").join(","));
    const text = [data.label_columns.join(","), ...lines].join("\n") + "\n";
    const link = make("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = "labels.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    saved = true;
  });
  addEventListener("beforeunload", (event) => { if (!saved) event.preventDefault(); });

  const side = (row, model) => {
    const reply = row[model];
    const part = make("div");
    const heading = make("h4", "", model);
    const tag = make("span", "tag");
    const dot = make("i", `sw-${{ refused: "refusal", answered: "safe_answer" }[reply.outcome] || reply.outcome}`);
    dot.setAttribute("aria-hidden", "true");
    tag.append(dot, data.outcomes[reply.outcome]);
    heading.append(tag);
    const remarks = [];
    if (reply.p !== null) remarks.push(`p(harmful) ${reply.p.toFixed(3)}`);
    if (reply.faults.length) remarks.push(reply.faults.join(", ").replaceAll("_", " "));
    if (reply.exact !== null) remarks.push(reply.exact ? "as the dataset has it" : "not as the dataset has it");
    if (reply.cut) remarks.push("cut off");
    part.append(heading);
    if (reply.sha) part.append(labelling(row, model));
    const what = `${data.outcomes[reply.outcome]} reply of the ${model} model to prompt ${row.number + 1}`;
    if (reply.hidden) part.append(veiled(reply.text, what, `${row.number} ${model}`));
    else part.append(...wording(reply.text));
    if (remarks.length) part.append(make("p", "quiet", remarks.join("; ")));
    return part;
  };

  const card = (row) => {
    const item = make("li");
    const kind = row.kind === "sample" ? `${data.kinds.sample}, number ${row.sample + 1}` : data.kinds[row.kind];
    const words = [`${row.number + 1}`, data.splits[row.split] || row.split, kind];
    if (row.category) words.push(row.category);
    if (row.changed) words.push("outcome changed");
    const heading = make("h3", "", words.join(" \u00b7 "));
    heading.dir = "auto";
    item.append(heading, ...wording(row.prompt, "prompt"));
    if (row.start) {
      item.append(make("p", "quiet", "The reply was made to begin with:"));
      item.append(veiled(row.start, `prefill of prompt ${row.number + 1}`, `${row.number} start`));
    }
    const pair = make("div", "pair");
    pair.append(...MODELS.map((model) => side(row, model)));
    item.append(pair);
    if (row.right) item.append(make("p", "quiet", "The dataset's answer:"), ...wording(row.right));
    return item;
  };

  const show = () => {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const rows = found.slice(page * PAGE, page * PAGE + PAGE);
    find("list").replaceChildren(...rows.map(card));
    const total = `${found.length.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")}`;
    const range = rows.length ? `, ${page * PAGE + 1} to ${page * PAGE + rows.length} shown` : "";
    find("status").textContent = `${total} pairs${range}`;
    find("where").textContent = `page ${page + 1} of ${pages}`;
    for (const id of ["first", "previous"]) find(id).disabled = page === 0;
    for (const id of ["next", "last"]) find(id).disabled = page === pages - 1;
    find("hide-all").hidden = !open.size;
  };

  const turns = { first: () => 0, previous: () => page - 1, next: () => page + 1, last: () => Infinity };
  for (const [id, to] of Object.entries(turns)) {
    const button = find(id);
    button.addEventListener("click", () => {
      page = to();
      show();
      find("filters").scrollIntoView();
      if (button.disabled) find("list").focus();
    });
  }
  find("hide-all").addEventListener("click", () => {
    open.clear();
    show();
    find("status").textContent = "All blurred again.";
    find("search").focus();
  });
  const form = find("filters");
  let pause = 0;
  find("search").addEventListener("input", () => {
    clearTimeout(pause);
    pause = setTimeout(select, 150);
  });
  form.addEventListener("change", (event) => { if (event.target.id !== "search") select(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(select));
  find("needs-script").remove();
  find("browser").hidden = false;
  show();
})();
