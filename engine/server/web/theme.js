// Before anything is drawn: the theme that was chosen, so that the page does not flash. Without one it is the system's.
try {
  const theme = JSON.parse(localStorage.getItem("svdengine.theme"));
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // nothing is kept here
}
