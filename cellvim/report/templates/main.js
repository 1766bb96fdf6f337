// Everything is set up in this order: what the parts below look at is there when they start.
async function main() {
  setUpTheme();
  setUpTables();
  setUpPlates();
  setUpCells();
  setUpChannels();
  await loadCrops();
  setUpNeighbours();
  document.documentElement.dataset.ready = "true";
}
main();
