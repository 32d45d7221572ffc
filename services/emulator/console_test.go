package emulator

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// messages records each write.
type messages []string

func (m *messages) Write(p []byte) (int, error) {
	*m = append(*m, string(p))
	return len(p), nil
}

// Output comes in lines, nothing is lost, doubled or out of order, and a prompt does not wait for its
// line's end.
func TestLineWriter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got messages
		w := newLineWriter(&got)
		write := func(s string) {
			if n, err := w.Write([]byte(s)); n != len(s) || err != nil {
				t.Errorf("Write(%q): %d, %v", s, n, err)
			}
		}
		expect := func(want ...string) {
			t.Helper()
			synctest.Wait()
			if !slices.Equal(got, want) {
				t.Errorf("written %q, want %q", got, want)
			}
			got = nil
		}
		write("[    0.000")
		write("000] Linux")
		expect()
		write(" 6.1\r\nCommand")
		expect("[    0.000000] Linux 6.1\r\nCommand")
		write("# ")
		<-time.After(2 * lineDelay)
		expect("# ")
		<-time.After(2 * lineDelay)
		expect()
		write(strings.Repeat("x", maxLine-1))
		expect()
		write("yz")
		expect(strings.Repeat("x", maxLine-1) + "yz")
		write("the end")
		w.Flush()
		expect("the end")
	})
}
