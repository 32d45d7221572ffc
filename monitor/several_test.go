package monitor

import (
	"fmt"
	"strings"
	"testing"

	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/isolate/attack"
	"redoubt.dev/redoubt/isolate/policy"
	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/lab/debian"
)

// several has two processors of a guest in one isolated module at once, and says what went wrong there.
func several(t *testing.T, vcpus int, weakened isolate.Weakness) map[string]string {
	t.Helper()
	built, err := attack.Build(t.Context(), cache(t), debian.Usual)
	if err != nil {
		t.Fatal(err)
	}
	const rounds = 160
	patience := 30
	if weakened != (isolate.Weakness{}) { // what is waited for does not come
		patience = 1
	}
	script := fmt.Sprintf("insmod /mod/several.ko rounds=%d patience=%d; sed 's/^/CHECK /; s/=/ /' /proc/several; rmmod several; echo LIVES\n", rounds, patience)
	m := isolate.Modules{Default: isolate.Isolate, Mode: policy.Learn, Weakened: weakened}
	said, r := scripts{vcpus: vcpus, modules: &m, files: map[string]string{"mod/several.ko": built["several"]}, script: script}.run(t)
	a := r.Modules["several"]
	if a == nil || a.Verdict != isolate.Isolate || !a.Unloaded {
		t.Fatalf("%+v", a)
	}
	t.Logf("%d rounds: %v; %s", rounds, said, summary(a))
	if said["wandered"] != fmt.Sprint(rounds/8) || said["same"] == "0" {
		t.Errorf("memory did not come and go: %v", said)
	}
	wrong := map[string]string{}
	for k, v := range said {
		if k != "wandered" && k != "same" && v != "0" {
			wrong[k] = v
		}
	}
	if len(said) != 14 {
		t.Errorf("said %v", said)
	}
	return wrong
}

// Two processors in one module at once lose nothing: of what they count with atomic instructions on memory that each access of is
// judged, of what the kernel writes on the stack of a thread that is in the module, and of what addresses lead to.
func TestFenceSeveral(t *testing.T) {
	lab.NeedsKVM(t)
	for _, vcpus := range []int{2, 4} {
		t.Run(fmt.Sprint(vcpus), func(t *testing.T) {
			if wrong := several(t, vcpus, isolate.Weakness{}); len(wrong) > 0 {
				t.Errorf("%v", wrong)
			}
		})
	}
}

// Each of the three is lost without what is done for it.
func TestFenceSeveralWeakened(t *testing.T) {
	lab.NeedsKVM(t)
	for _, c := range []struct {
		name     string
		weakened isolate.Weakness
		lost     string
	}{
		{"atomic", isolate.Weakness{Atomic: true}, "inc add swapped guarded box half byte"},
		{"stack", isolate.Weakness{Stack: true}, "lost"},
		{"translations", isolate.Weakness{Translations: true}, "stale"},
	} {
		t.Run(c.name, func(t *testing.T) {
			wrong := several(t, 2, c.weakened)
			for _, k := range strings.Fields(c.lost) {
				if wrong[k] != "" {
					return
				}
			}
			t.Errorf("nothing of %s was lost: %v", c.lost, wrong)
		})
	}
}
