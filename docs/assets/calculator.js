// Sizes of a build, by the formulas of the page; times are for la.plan, which measures.
document$.subscribe(() => {
  const place = document.getElementById("calculator");
  if (!place || place.dataset.ready) return;
  place.dataset.ready = "yes";
  const inputs = [
    ["rows", "rows", 50000000], ["dimension", "dimension", 768], ["element", "bytes of an element", 4],
    ["k", "K (num_partitions)", 6103], ["m", "M (num_sub_vectors)", 48], ["bits", "num_bits", 8], ["rate", "sample_rate", 256],
  ];
  const size = (bytes) => {
    const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let unit = 0;
    while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit += 1; }
    return `${bytes.toFixed(unit ? 1 : 0)} ${units[unit]}`;
  };
  const table = document.createElement("table");
  const fields = {};
  for (const [name, label, value] of inputs) {
    const row = table.insertRow();
    const said = document.createElement("label");
    said.textContent = label;
    said.htmlFor = `calculator-${name}`;
    row.insertCell().append(said);
    const field = document.createElement("input");
    Object.assign(field, { id: `calculator-${name}`, type: "number", min: 1, value });
    fields[name] = field;
    row.insertCell().append(field);
  }
  const results = document.createElement("table");
  const show = () => {
    const v = Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, Number(field.value) || 0]));
    const codes = 2 ** v.bits, width = (v.m * v.bits) / 8, vector = v.dimension * v.element;
    const sample = Math.min(v.rows, v.rate * Math.max(v.k, codes));
    const model = (v.k + codes) * vector;
    const most = Math.min(4096, Math.max(1, Math.floor(v.rows / 8192)));
    const lines = [
      ["default K", most.toLocaleString()],
      ["rows of a partition", Math.round(v.rows / Math.max(v.k, 1)).toLocaleString()],
      ["sample in training", `${sample.toLocaleString()} vectors, ${size(sample * vector * (v.element === 4 ? 1 : 1 + 4 / v.element))}`],
      ["artifact, while it is built", size(v.rows * (12 + width) + model)],
      ["index", size(v.rows * (8 + width) + model)],
      ["vectors read", size(v.rows * vector + sample * vector)],
      ["encoding", `${((2 * v.rows * v.dimension * (v.k + codes)) / 1e15).toPrecision(3)} · 10¹⁵ operations`],
    ];
    results.replaceChildren();
    for (const [what, value] of lines) {
      const row = results.insertRow();
      row.insertCell().textContent = what;
      row.insertCell().textContent = value;
    }
    const wrong = v.dimension % Math.max(v.m, 1) ? "M must divide the dimension. " : "";
    note.textContent = wrong + (v.rows < v.k * v.rate ? `A whole table is cut in at most rows / sample_rate = ${Math.floor(v.rows / Math.max(v.rate, 1)).toLocaleString()} partitions.` : "");
  };
  const note = document.createElement("p");
  for (const field of Object.values(fields)) field.addEventListener("input", show);
  place.append(table, note, results);
  show();
});
