// The perturbations nearest to the one that is chosen, each with crops of its cells.
function setUpNeighbours() {
  const about = DATA.neighbours;
  if (!about) return;
  const choice = document.getElementById("perturbation");
  about.list.forEach((one, i) => choice.append(element("option", { value: String(i) }, one.name)));
  choice.value = String(about.initial);
  choice.addEventListener("change", () => show(Number(choice.value)));
  const show = (i) => {
    const own = about.list[i];
    const rows = [neighbourRow(own, null)];
    for (const [j, similarity] of own.nearest) rows.push(neighbourRow(about.list[j], similarity));
    document.getElementById("nearest").replaceChildren(...rows);
  };
  show(about.initial);
}

function neighbourRow(one, similarity) {
  const text = element("div", {}, element("div", { class: "name" }, one.name));
  if (similarity !== null) text.append(element("div", { class: "soft small" }, `cosine similarity ${similarity.toFixed(2)}`));
  for (const [name, value] of one.about) text.append(element("div", { class: "soft small" }, `${name}: ${value}`));
  const pictures = element("div", { class: "crops" });
  for (const crop of one.crops) {
    pictures.append(element("figure", {}, cropCanvas(crop, `Crop of ${DATA.crops.names[crop]}`)));
  }
  if (!one.crops.length) pictures.append(element("span", { class: "soft small" }, DATA.neighbours.without));
  return element("div", { class: similarity === null ? "neighbour self" : "neighbour" }, text, pictures);
}
