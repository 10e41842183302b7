for(const box of document.querySelectorAll(".filter")){box.hidden=false;box.addEventListener("input",()=>{
const wanted=box.value.toLowerCase();for(const row of document.querySelectorAll(".settings div"))
row.hidden=!row.textContent.toLowerCase().includes(wanted)})}
