package main

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	format "gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// patience is the time limit of every wait in a test.
const patience = 30 * time.Second

// newGuest makes a network, and a guest's own stack at the other end of the card.
func newGuest(t *testing.T) (*network, *stack.Stack) {
	n, err := newNetwork(1500)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := net.Pipe()
	t.Cleanup(func() { _ = ours.Close() })
	go func() { _ = n.serve(checked(theirs)) }()

	card := channel.New(4096, 1500, tcpip.LinkAddress("\x52\x54\x00\x12\x34\x56"))
	go func() {
		for {
			packet := card.ReadContext(t.Context())
			if packet == nil {
				return
			}
			frame := packet.ToView()
			packet.DecRef()
			text := binary.BigEndian.AppendUint32(nil, uint32(frame.Size()))
			if _, err := ours.Write(append(text, frame.AsSlice()...)); err != nil {
				return
			}
		}
	}()
	go func() {
		for {
			var length [4]byte
			if _, err := io.ReadFull(ours, length[:]); err != nil {
				return
			}
			frame := make([]byte, binary.BigEndian.Uint32(length[:]))
			if _, err := io.ReadFull(ours, frame); err != nil {
				return
			}
			packet := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame)})
			card.InjectInbound(format.Ethernet(frame).Type(), packet)
			packet.DecRef()
		}
	}()
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
	})
	if err := s.CreateNIC(1, ethernet.New(card)); err != nil {
		t.Fatal(err)
	}
	ip := tcpip.AddressWithPrefix{Address: address(guest), PrefixLen: 24}
	if err := s.AddProtocolAddress(1, tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber, AddressWithPrefix: ip}, stack.AddressProperties{}); err != nil {
		t.Fatal(err)
	}
	s.SetRouteTable([]tcpip.Route{{Destination: format.IPv4EmptySubnet, Gateway: address(gateway), NIC: 1}})
	return n, s
}

func ofHost(listener net.Addr) tcpip.FullAddress {
	_, port, _ := net.SplitHostPort(listener.String())
	number, _ := net.LookupPort("tcp", port)
	return tcpip.FullAddress{NIC: 1, Addr: address(host), Port: uint16(number)}
}

func connect(t *testing.T, s *stack.Stack, to tcpip.FullAddress) (*gonet.TCPConn, error) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	return gonet.DialContextTCP(ctx, s, to, ipv4.ProtocolNumber)
}

func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for since := time.Now(); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Since(since) > patience {
			t.Fatal("it did not happen: ", what)
		}
	}
}

func TestAGuestHasSoManyConnectionsAndThenRoomForNewOnes(t *testing.T) {
	n, s := newGuest(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(client, client); _ = client.Close() }()
		}
	}()
	var open []net.Conn
	for {
		client, err := connect(t, s, ofHost(listener.Addr()))
		if err != nil {
			break
		}
		if open = append(open, client); len(open) > maxConnections {
			t.Fatal("no limit")
		}
	}
	if connections, _ := n.count(); connections > maxConnections+maxDialing || len(open) < maxConnections-10 {
		t.Fatal(connections, len(open))
	}
	var buffers int64
	for _, endpoint := range n.stack.RegisteredEndpoints() {
		if endpoint, ok := endpoint.(tcpip.Endpoint); ok {
			options := endpoint.SocketOptions()
			buffers += options.GetReceiveBufferSize() + options.GetSendBufferSize()
		}
	}
	if few := int64(2 * manyConnections * bufferSize); buffers < few || buffers > few+2*smallBufferSize*(maxConnections-manyConnections)+20<<20 {
		t.Fatal("the buffers may hold ", buffers)
	}
	if _, err := n.dial(t.Context(), 80); err != errFull {
		t.Fatal("a client of the host's: ", err)
	}
	// Existing connections work, and connections that end make room.
	echo := make([]byte, 5)
	if _, err := open[0].Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(open[0], echo); err != nil || string(echo) != "hello" {
		t.Fatal(err, string(echo))
	}
	for _, client := range open {
		_ = client.Close()
	}
	until(t, "all have ended", func() bool { connections, _ := n.count(); return connections < 10 })
	client, err := connect(t, s, ofHost(listener.Addr()))
	if err != nil {
		t.Fatal(err)
	}
	_ = client.Close()
}

func TestAddressesThatDoNotAnswerKeepAGuestFromNothing(t *testing.T) {
	_, s := newGuest(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	// A backlog of one whose connections are not accepted: Linux does not answer further connections.
	silent, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(silent)
	if err := syscall.Bind(silent, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(silent, 0); err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(silent)
	if err != nil {
		t.Fatal(err)
	}
	to := tcpip.FullAddress{NIC: 1, Addr: address(host), Port: uint16(name.(*syscall.SockaddrInet4).Port)}
	// Long enough for the connections that found no place to ask again.
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
	defer cancel()
	unanswered := make(chan error)
	for range 20 {
		go func() {
			_, err := gonet.DialContextTCP(ctx, s, to, ipv4.ProtocolNumber)
			unanswered <- err
		}()
	}
	timedOut := 0
	for range 20 {
		if err := <-unanswered; err == context.DeadlineExceeded {
			timedOut++
		}
	}
	if timedOut < 11 {
		t.Fatal("no more than that do not answer: ", timedOut)
	}
	client, err := connect(t, s, ofHost(listener.Addr()))
	if err != nil {
		t.Fatal(err)
	}
	_ = client.Close()
}

func TestAGuestHasSoManyFlows(t *testing.T) {
	n, s := newGuest(t)
	sink, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer sink.Close()
	to := ofHost(sink.LocalAddr())
	send := func() {
		from, err := gonet.DialUDP(s, nil, &to, ipv4.ProtocolNumber)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = from.Write([]byte("x"))
		_ = from.Close()
	}
	for range maxFlows + 500 {
		send()
	}
	until(t, "as many as there may be", func() bool { send(); _, flows := n.count(); return flows == maxFlows })
	for range 500 {
		send()
	}
	time.Sleep(200 * time.Millisecond)
	if _, flows := n.count(); flows != maxFlows {
		t.Fatal(flows)
	}
}

func TestAListenerOutlivesALackOfDescriptors(t *testing.T) {
	inner := &failing{errors: []error{lack("accept4"), lack("accept")}}
	client, err := patient{inner}.Accept()
	if err != nil || client == nil || len(inner.errors) != 0 {
		t.Fatal(client, err)
	}
}

type failing struct {
	net.Listener
	errors []error
}

func (f *failing) Accept() (net.Conn, error) {
	if len(f.errors) > 0 {
		err := f.errors[0]
		f.errors = f.errors[1:]
		return nil, err
	}
	client, _ := net.Pipe()
	return client, nil
}

func lack(call string) error {
	return &net.OpError{Op: "accept", Err: os.NewSyscallError(call, syscall.EMFILE)}
}
